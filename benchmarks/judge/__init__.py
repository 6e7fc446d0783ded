"""What comparing costs: all pairs with nothing computed twice and adaptive pairs, against one comparison at a time."""
