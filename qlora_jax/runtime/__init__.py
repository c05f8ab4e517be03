"""Tools that all other folders use: errors, files, processes, devices and versions."""
