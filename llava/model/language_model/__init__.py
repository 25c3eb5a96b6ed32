"""Language models that take image features among their words."""
