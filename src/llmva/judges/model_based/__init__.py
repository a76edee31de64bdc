"""Judges that ask a model: guards, classifiers and general models, here or on a server."""
