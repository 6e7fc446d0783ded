"""``reward-service evaluate``: how well a reward model agrees with people's preferences."""
