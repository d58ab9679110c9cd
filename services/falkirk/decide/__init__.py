"""Rules and routes as pure functions, shared by those who own them and those who apply them. PURE."""
