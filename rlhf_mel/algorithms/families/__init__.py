"""What algorithms of one kind share."""
