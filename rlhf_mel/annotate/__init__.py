"""People label pairs of clips: the page, its storage, agreement of annotators, and the data set that comes out."""
