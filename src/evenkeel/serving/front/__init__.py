"""What every front end needs: the items of a request, their flight, their answers, image files."""
