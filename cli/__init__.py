"""The command line: dsg."""
