"""What the evidence for the README rests on: one command per table."""
