-- Accounts, their keys, the calls they pay for and the entries that prove it.
-- Every time is milliseconds since the Unix epoch; every amount is whole credits.

-- An account owns one balance. balance = all credits, held = promised to calls in flight.
CREATE TABLE account (
    id TEXT PRIMARY KEY,
    status TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended')),
    status_reason TEXT,
    balance BIGINT NOT NULL DEFAULT 0 CHECK (balance BETWEEN 0 AND 1000000000000000),
    held BIGINT NOT NULL DEFAULT 0 CHECK (held BETWEEN 0 AND balance),
    -- How many calls are in flight: the limit on calls at once needs no count of rows.
    open_calls BIGINT NOT NULL DEFAULT 0 CHECK (open_calls >= 0),
    -- The last numbers given to a call and to an entry of this account. Order comes from these,
    -- never from the clock, which may step.
    last_call BIGINT NOT NULL DEFAULT 0,
    last_entry BIGINT NOT NULL DEFAULT 0,
    last_topup_at BIGINT,
    created_at BIGINT NOT NULL
);

-- Calls with the operator key are recorded here; its balance stays zero.
INSERT INTO account (id, created_at) VALUES ('acct_operator', 0);

-- A person who signs in; owns exactly one account.
CREATE TABLE user (
    id TEXT PRIMARY KEY,
    email TEXT NOT NULL UNIQUE,  -- lower case
    password_hash TEXT,          -- argon2id; NULL until the person chose one
    is_operator BIGINT NOT NULL DEFAULT 0 CHECK (is_operator IN (0, 1)),
    account_id TEXT NOT NULL UNIQUE REFERENCES account (id),
    created_at BIGINT NOT NULL
);

-- A link that works once: to set up the instance, or to choose a new password.
CREATE TABLE one_time_link (
    token_hash BLOB PRIMARY KEY,
    purpose TEXT NOT NULL CHECK (purpose IN ('setup', 'reset')),
    account_id TEXT NOT NULL REFERENCES account (id),  -- what a set-up gives its user
    user_id TEXT REFERENCES user (id),                 -- whose password a reset replaces
    expires_at BIGINT NOT NULL,
    used_at BIGINT
);

CREATE TABLE api_key (
    id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES account (id),
    user_id TEXT REFERENCES user (id),
    name TEXT NOT NULL,
    lookup TEXT NOT NULL UNIQUE,  -- the public part of the key, by which it is found
    start TEXT NOT NULL,          -- what a person may be shown of it
    hash TEXT NOT NULL,           -- argon2id of the whole key
    previous_hash TEXT,           -- the secret before the last rotation, good until previous_until
    previous_lookup TEXT UNIQUE,
    previous_until BIGINT,
    status TEXT NOT NULL DEFAULT 'active'
        CHECK (status IN ('active', 'suspended', 'revoked', 'expired')),
    suspended_by TEXT CHECK (suspended_by IN ('operator', 'owner')),
    status_reason TEXT,
    scopes TEXT,                  -- JSON list; NULL means every paid route
    expires_at BIGINT,
    credit_limit BIGINT CHECK (credit_limit >= 0),
    credit_period TEXT CHECK (credit_period IN ('total', 'day', 'week', 'month')),
    rate_limit BIGINT CHECK (rate_limit >= 0),
    created_at BIGINT NOT NULL,
    last_used_at BIGINT,          -- written at most every five minutes
    CHECK ((credit_limit IS NULL) = (credit_period IS NULL)),
    CHECK ((previous_hash IS NULL) = (previous_until IS NULL)),
    CHECK ((previous_hash IS NULL) = (previous_lookup IS NULL))
);
CREATE INDEX api_key_of_account ON api_key (account_id);

-- Requests in the current minute, by whatever is limited: a key, or a client that fails to sign in.
CREATE TABLE rate_window (
    subject TEXT PRIMARY KEY,
    minute BIGINT NOT NULL,
    used BIGINT NOT NULL
);

-- Credits held and captured in a calendar period under a credit limit.
CREATE TABLE credit_window (
    subject TEXT NOT NULL,
    starts_at BIGINT NOT NULL,
    used BIGINT NOT NULL CHECK (used >= 0),
    PRIMARY KEY (subject, starts_at)
);

-- A paid call. While its status is 'held' it is the hold; it is resolved once.
CREATE TABLE call (
    id TEXT PRIMARY KEY,
    request_id TEXT NOT NULL,     -- as answered in X-Request-Id; a caller may have chosen it
    account_id TEXT NOT NULL REFERENCES account (id),
    number BIGINT NOT NULL,       -- account.last_call when it was made
    payer TEXT NOT NULL CHECK (payer IN ('api_key', 'session', 'wallet', 'x402', 'operator')),
    key_id TEXT,
    user_id TEXT,
    route TEXT NOT NULL,
    method TEXT NOT NULL,
    model TEXT,
    input_tokens BIGINT,
    output_tokens BIGINT,
    units BIGINT NOT NULL,
    price BIGINT NOT NULL,        -- what it costs, or would have cost the operator
    held BIGINT NOT NULL CHECK (held >= 0),
    captured BIGINT NOT NULL DEFAULT 0 CHECK (captured BETWEEN 0 AND held),
    status TEXT NOT NULL DEFAULT 'held' CHECK (status IN ('held', 'captured', 'voided')),
    upstream_status BIGINT,
    duration_ms BIGINT,
    estimated BIGINT NOT NULL DEFAULT 0,
    cost_usd TEXT,                -- decimal; what the call cost the operator
    created_at BIGINT NOT NULL,
    -- The worker that made the hold; when its lock is gone, so is the call (core/incarnation.py).
    incarnation TEXT NOT NULL,
    idempotency_key TEXT,
    -- The start of the key's credit period this call was counted in; NULL when it has no limit.
    credit_window_at BIGINT
);
CREATE UNIQUE INDEX call_of_account ON call (account_id, number);
CREATE INDEX call_of_key ON call (key_id, number) WHERE key_id IS NOT NULL;
CREATE INDEX call_by_request ON call (request_id) WHERE request_id <> id;
CREATE INDEX call_in_flight ON call (incarnation) WHERE status = 'held';

-- Every change of a balance, never edited: a correction is another entry.
CREATE TABLE entry (
    id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES account (id),
    number BIGINT NOT NULL,       -- account.last_entry when it was made
    kind TEXT NOT NULL CHECK (kind IN
        ('grant', 'signup', 'topup', 'voucher', 'capture', 'refund', 'adjustment')),
    amount BIGINT NOT NULL CHECK (amount <> 0),
    balance BIGINT NOT NULL CHECK (balance >= 0),  -- after this entry
    reference TEXT NOT NULL,      -- what moved the credits: a call's id, or one of its own
    note TEXT,
    key_id TEXT,                  -- the key whose call this was
    created_at BIGINT NOT NULL
);
CREATE UNIQUE INDEX entry_of_account ON entry (account_id, number);
CREATE UNIQUE INDEX entry_once ON entry (kind, reference);
CREATE INDEX entry_of_key ON entry (key_id, number) WHERE key_id IS NOT NULL;

CREATE TRIGGER entry_is_never_edited BEFORE UPDATE ON entry
BEGIN SELECT RAISE(ABORT, 'a ledger entry is never edited'); END;
-- INSERT OR REPLACE deletes without firing the trigger below.
CREATE TRIGGER entry_is_never_replaced BEFORE INSERT ON entry WHEN EXISTS (
    SELECT 1 FROM entry WHERE id = NEW.id OR (kind = NEW.kind AND reference = NEW.reference)
        OR (account_id = NEW.account_id AND number = NEW.number)
)
BEGIN SELECT RAISE(ABORT, 'a ledger entry is never replaced'); END;
CREATE TRIGGER entry_is_never_deleted BEFORE DELETE ON entry
BEGIN SELECT RAISE(ABORT, 'a ledger entry is never deleted'); END;

-- The answer to a charged request, by the caller's Idempotency-Key.
CREATE TABLE idempotency (
    account_id TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint BLOB NOT NULL,    -- digest of method, path, query and body
    call_id TEXT NOT NULL,
    -- running: the first call is in flight · stored: its answer is kept · lost: charged, not kept
    state TEXT NOT NULL CHECK (state IN ('running', 'stored', 'lost')),
    status BIGINT,
    headers TEXT,                 -- JSON list of pairs
    body BLOB,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (account_id, key)
);
CREATE INDEX idempotency_by_age ON idempotency (created_at);
