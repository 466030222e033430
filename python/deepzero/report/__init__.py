"""What is shown to people: profiles, checks, pictures."""
