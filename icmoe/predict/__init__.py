"""A trained model on a new study: read as ingest reads it, segmented slice by slice, written back in its own geometry."""
