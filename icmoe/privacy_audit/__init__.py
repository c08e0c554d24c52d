"""Attacks on the product's own private step: whether what is promised to a patient is kept, measured from outside."""
