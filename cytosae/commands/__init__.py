"""Commands of stage two: options, one call, printed lines. cli.py says which command lives where."""
