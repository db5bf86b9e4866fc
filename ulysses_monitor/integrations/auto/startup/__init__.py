"""A folder for Python's path, see `sitecustomize`; nothing imports it as a package."""
