"""What happened, as pictures for people."""
