"""The command `bench gpu`: checks and measures this project on one GPU, and reports the results.

GPU time is limited, so the work is divided into parts (`parts`), the most valuable first. Each part
runs in a process of its own with a time limit (`conduct`, `child`) and writes each result at once
as a line of JSON (`record`). `report` builds the report from the lines, and `page` makes Markdown
and a picture of the report.
"""
