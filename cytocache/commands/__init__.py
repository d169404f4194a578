"""Commands of stage one: options, one call, printed lines. cli.py says which command lives where."""
