"""How the engine scales: a curve over one quantity, measured point by point; nothing else imports it."""
