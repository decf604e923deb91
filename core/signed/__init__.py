"""What wallets sign: messages that sign in or link, and requests (RFC 9421)."""
