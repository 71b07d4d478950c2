"""What `qat-train` trains: data modules, networks by name, and an image classifier."""
