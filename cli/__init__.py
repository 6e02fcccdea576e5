"""The `dsg` command: one file for each subcommand.

What a subcommand needs is imported when it runs, so that `dsg --help` is quick.
"""
