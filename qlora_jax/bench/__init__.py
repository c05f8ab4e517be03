"""Our figures on the machine at hand, and beside installed peers'."""
