"""What every other folder may use: errors, files, the process, the devices, versions."""
