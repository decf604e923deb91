-- Wallets that sign: in, and each request.

-- What may be used once, until it would not be taken any more.
CREATE TABLE used_nonce (
    digest BLOB PRIMARY KEY,      -- of what it is for, who chose it, and what they chose
    expires_at BIGINT NOT NULL
) WITHOUT ROWID;
CREATE INDEX used_nonce_expired ON used_nonce (expires_at);
