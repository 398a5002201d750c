"""The terminal: flags made of configurations, records made into bars, lines, tables and JSON.

With `cli.py` the only users of click and rich. stdout carries results, stderr everything else.
"""
