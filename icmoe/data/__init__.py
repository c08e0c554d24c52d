"""A hospital's images and masks, read once, checked fully, and described by typed records."""
