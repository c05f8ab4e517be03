"""One command that checks, measures and reports what this project does on the GPU at hand.

GPU time is short, so the work is cut into parts (`parts`), ordered by their value. Each part is a
process of its own with a time limit (`conduct`, `child`) and writes every result at once as a line
of JSON (`record`). `report` turns the lines into a report, a table and a picture.
"""
