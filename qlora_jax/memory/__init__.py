"""What a program needs on a GPU, before one is there."""
