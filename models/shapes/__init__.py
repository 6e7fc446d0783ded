"""The embedded world: captioned pictures of coloured shapes, the truth about any of them, and small trained models."""
