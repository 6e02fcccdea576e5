"""One trained model as files for other runtimes."""
