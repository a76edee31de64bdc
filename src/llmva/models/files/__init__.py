"""A model's files on disk: which are its weights, what these hold, and what belongs to the model beside them."""
