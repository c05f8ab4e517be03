"""Models of other packages, small enough to train in seconds on a CPU.

`cases` defines a case and `every` lists all cases; one module per package builds its models.
`nnx_way` and `linen_way` call the library as its users do; `measure` compares and trains.
"""
