-- Payments on the spot (x402), and the wallets that made them.

-- A wallet belongs to one account: the one that its first payment opened.
CREATE TABLE wallet (
    id TEXT PRIMARY KEY,          -- namespace:address; an eip155 address in lower case
    name TEXT NOT NULL,           -- the same as people write it
    account_id TEXT NOT NULL REFERENCES account (id),
    created_at BIGINT NOT NULL
);
CREATE INDEX wallet_of_account ON wallet (account_id);

-- A payment that was claimed for one request. The claim comes before the settlement, so one payment
-- is settled for one request, however many send it at once.
CREATE TABLE payment (
    id TEXT PRIMARY KEY,
    number BIGINT NOT NULL UNIQUE,  -- in the order in which they were first claimed
    key TEXT NOT NULL UNIQUE,       -- what is unique about it on its network
    network TEXT NOT NULL,          -- CAIP-2
    asset TEXT NOT NULL,
    wallet TEXT NOT NULL,           -- the payer's
    wallet_name TEXT NOT NULL,
    pay_to TEXT NOT NULL,
    amount BIGINT NOT NULL CHECK (amount > 0),   -- in the token's smallest units
    credits BIGINT NOT NULL CHECK (credits > 0), -- what it is worth here
    purpose TEXT NOT NULL CHECK (purpose IN ('call', 'topup')),
    method TEXT NOT NULL,
    path TEXT NOT NULL,
    fingerprint BLOB NOT NULL,      -- digest of the request it was claimed for, and for whom
    print BLOB NOT NULL,            -- of the request alone, as stored answers know it
    -- Whose credits it becomes: the Bearer's account, or the wallet's once it is settled.
    account_id TEXT REFERENCES account (id),
    answer_key TEXT NOT NULL,       -- under which the answer is kept, in `idempotency`
    call_id TEXT,                   -- the last call that was made on it
    -- settling: with the facilitator, or its worker is gone · unknown: nobody has said how it ended
    -- settled: the money moved, and the credits are entered · refused: no money moved
    status TEXT NOT NULL CHECK (status IN ('settling', 'unknown', 'settled', 'refused')),
    reason TEXT,                    -- why it was refused, or is not known
    transaction_id TEXT,            -- on the network
    proof TEXT,                     -- JSON: what was signed, until it is known how it ended
    expires_at BIGINT,              -- from then on the network does not take it, where it says so
    incarnation TEXT NOT NULL,      -- the worker that settles it
    claim BIGINT NOT NULL DEFAULT 1,   -- how often it was claimed: one that was refused can be again
    looks BIGINT NOT NULL DEFAULT 0,   -- how often it was tried to find out
    next_look_at BIGINT,
    created_at BIGINT NOT NULL,
    decided_at BIGINT,
    CHECK (status <> 'settled' OR account_id IS NOT NULL)
);
CREATE INDEX payment_undecided ON payment (next_look_at) WHERE status IN ('settling', 'unknown');
CREATE INDEX payment_refused ON payment (decided_at) WHERE status = 'refused';
CREATE INDEX payment_of_account ON payment (account_id, number) WHERE account_id IS NOT NULL;
CREATE INDEX payment_of_wallet ON payment (wallet, number);
