"""The publisher: measures every candidate against the model that serves, and puts the better one in force."""
