"""From a folder that a PACS exported to a site's index: read, paired, checked, without what identifies a patient."""
