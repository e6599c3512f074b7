"""Other packages: each module here imports its optional packages itself, and only when it is used."""
