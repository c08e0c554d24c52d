"""A hospital's side: ClientApp, site file, command line."""
