"""Models of other people's packages, small enough to train in seconds on a CPU.

`cases` says what a case is and `every` lists them; a module for each package builds its models.
`nnx_way` and `linen_way` call the library as its users do, and `measure` compares and trains.
"""
