"""What torch's operators do in many steps, compiled as one: see `library`."""
