"""The atlas: one run as a folder of web pages that an expert opens without a server, a network or Python.

Reading order: config, inputs, cohort, plan, then build.py, which writes what the pages modules describe.
"""
