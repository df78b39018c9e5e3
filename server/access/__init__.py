"""Who may ask for what and how much, and what they used: keys, rate limits and usage."""
