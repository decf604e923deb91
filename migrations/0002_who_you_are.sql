-- People and what they may do: members of accounts, sign-ins, session tokens, outside identities;
-- and the record of who did what. Where a CHECK had to change the table is made anew, because
-- SQLite cannot alter one.

-- An account can be closed.
CREATE TABLE account_new (
    id TEXT PRIMARY KEY,
    status TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended', 'closed')),
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
INSERT INTO account_new (id, status, status_reason, balance, held, open_calls, last_call,
    last_entry, last_topup_at, created_at)
SELECT id, status, status_reason, balance, held, open_calls, last_call, last_entry, last_topup_at,
    created_at FROM account;
DROP TABLE account;
ALTER TABLE account_new RENAME TO account;

-- A person who signs in; owns exactly one account.
CREATE TABLE user_new (
    id TEXT PRIMARY KEY,
    email TEXT UNIQUE,           -- lower case; NULL when only an outside issuer knows the person
    password_hash TEXT,          -- argon2id; NULL until the person chose one
    is_operator BIGINT NOT NULL DEFAULT 0 CHECK (is_operator IN (0, 1)),
    status TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended', 'closed')),
    status_reason TEXT,
    account_id TEXT NOT NULL UNIQUE REFERENCES account (id),
    created_at BIGINT NOT NULL
);
INSERT INTO user_new (id, email, password_hash, is_operator, account_id, created_at)
SELECT id, email, password_hash, is_operator, account_id, created_at FROM user;
DROP TABLE user;
ALTER TABLE user_new RENAME TO user;

-- Who may spend an account's credits, on what terms. A removed member's row is deleted.
CREATE TABLE membership (
    id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES account (id),
    user_id TEXT REFERENCES user (id),  -- NULL while only invited
    email TEXT,                         -- whom the invitation is for; NULL once it was accepted
    role TEXT NOT NULL CHECK (role IN ('owner', 'member')),
    credit_limit BIGINT CHECK (credit_limit >= 0),
    credit_period TEXT CHECK (credit_period IN ('total', 'day', 'week', 'month')),
    created_at BIGINT NOT NULL,
    CHECK ((user_id IS NULL) <> (email IS NULL)),
    CHECK ((credit_limit IS NULL) = (credit_period IS NULL))
);
CREATE UNIQUE INDEX membership_of_person ON membership (account_id, user_id)
    WHERE user_id IS NOT NULL;
CREATE UNIQUE INDEX membership_invited ON membership (account_id, email) WHERE email IS NOT NULL;
CREATE INDEX membership_of_user ON membership (user_id) WHERE user_id IS NOT NULL;
INSERT INTO membership (id, account_id, user_id, role, created_at)
SELECT 'mem_' || substr(id, 6), account_id, id, 'owner', created_at FROM user;

-- A link that works once: to set up the instance, choose a new password, or join an account.
CREATE TABLE one_time_link_new (
    token_hash BLOB PRIMARY KEY,
    purpose TEXT NOT NULL CHECK (purpose IN ('setup', 'reset', 'invite')),
    account_id TEXT NOT NULL REFERENCES account (id),  -- what a set-up gives its user
    user_id TEXT REFERENCES user (id),                 -- whose password a reset replaces
    membership_id TEXT,                                -- what an invitation fills
    expires_at BIGINT NOT NULL,
    used_at BIGINT
);
INSERT INTO one_time_link_new (token_hash, purpose, account_id, user_id, expires_at, used_at)
SELECT token_hash, purpose, account_id, user_id, expires_at, used_at FROM one_time_link;
DROP TABLE one_time_link;
ALTER TABLE one_time_link_new RENAME TO one_time_link;
CREATE INDEX one_time_link_open ON one_time_link (expires_at) WHERE used_at IS NULL;
CREATE INDEX one_time_link_used ON one_time_link (used_at) WHERE used_at IS NOT NULL;
CREATE INDEX one_time_link_of_user ON one_time_link (user_id) WHERE user_id IS NOT NULL;
CREATE INDEX one_time_link_of_membership ON one_time_link (membership_id)
    WHERE membership_id IS NOT NULL;

-- Keys are listed newest first by a number of their account's.
ALTER TABLE api_key ADD COLUMN number BIGINT NOT NULL DEFAULT 0;
UPDATE api_key SET number = counted.number FROM (
    SELECT id, ROW_NUMBER() OVER (PARTITION BY account_id ORDER BY created_at, id) AS number
    FROM api_key
) counted WHERE counted.id = api_key.id;
DROP INDEX api_key_of_account;
-- The person who suspended a key, when it was one: another member does not resume it.
ALTER TABLE api_key ADD COLUMN suspended_by_user TEXT;
CREATE UNIQUE INDEX api_key_of_account ON api_key (account_id, number);
CREATE INDEX api_key_of_user ON api_key (user_id) WHERE user_id IS NOT NULL;

-- The start of the member's credit period a call was counted in; NULL when they have no limit.
ALTER TABLE call ADD COLUMN member_window_at BIGINT;

-- A sign-in. Its id is the `sid` of the tokens it gives.
CREATE TABLE session (
    id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL REFERENCES user (id),
    cookie_hash BLOB UNIQUE,      -- digest of the cookie's secret; NULL when no cookie opens it
    method TEXT NOT NULL,         -- how: password, setup, invite, reset, cli, oidc:<name>, token
    origin TEXT,                  -- for `token`: the outside session_token it was traded for
    address TEXT,
    user_agent TEXT,
    created_at BIGINT NOT NULL,
    last_seen_at BIGINT NOT NULL, -- of the cookie; written at most once a minute
    expires_at BIGINT NOT NULL,   -- whatever happens
    ended_at BIGINT
);
CREATE INDEX session_of_user ON session (user_id, created_at) WHERE ended_at IS NULL;
CREATE INDEX session_open ON session (expires_at) WHERE ended_at IS NULL;
CREATE INDEX session_awake ON session (last_seen_at) WHERE cookie_hash IS NOT NULL;
CREATE INDEX session_over ON session (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX session_traded ON session (origin) WHERE origin IS NOT NULL;

-- Every session token that was accepted, so that it can be ended: ours from their minting on,
-- an outside issuer's from their first use on.
CREATE TABLE session_token (
    id TEXT PRIMARY KEY,          -- ours: the jti; an outsider's: a digest, see core/issuers.py
    session_id TEXT REFERENCES session (id),  -- NULL for an outsider's
    user_id TEXT NOT NULL REFERENCES user (id),
    account_id TEXT NOT NULL REFERENCES account (id),
    expires_at BIGINT NOT NULL,
    ended_at BIGINT
);
CREATE INDEX session_token_of_user ON session_token (user_id);
CREATE INDEX session_token_of_session ON session_token (session_id) WHERE session_id IS NOT NULL;
CREATE INDEX session_token_open ON session_token (expires_at) WHERE ended_at IS NULL;
CREATE INDEX session_token_by_age ON session_token (expires_at);

-- A person as an outside issuer names them.
CREATE TABLE identity (
    issuer TEXT NOT NULL,
    subject TEXT NOT NULL,
    user_id TEXT NOT NULL REFERENCES user (id),
    created_at BIGINT NOT NULL,
    PRIMARY KEY (issuer, subject)
);
CREATE INDEX identity_by_subject ON identity (subject);
CREATE INDEX identity_of_user ON identity (user_id);

-- Outside tokens that are not accepted, because no issuer tells us who has signed out.
CREATE TABLE denied_token (
    claim TEXT NOT NULL CHECK (claim IN ('sub', 'jti')),
    value TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (claim, value)
);

-- The key sets of outside issuers as last fetched: shared by all workers, and kept over a restart.
CREATE TABLE issuer_keys (
    url TEXT PRIMARY KEY,
    document TEXT,
    fetched_at BIGINT,
    attempted_at BIGINT NOT NULL  -- whoever moves this forward may fetch
);

-- Who did what, never edited.
CREATE TABLE audit (
    id TEXT PRIMARY KEY,
    number BIGINT NOT NULL UNIQUE,
    at BIGINT NOT NULL,
    actor TEXT NOT NULL,          -- a user's id, `operator` (the command line), `operator_key`
    address TEXT,                 -- from where, when it came over HTTP
    action TEXT NOT NULL,
    account_id TEXT,              -- whose owners may read it
    subject TEXT,                 -- the id of what was acted on
    detail TEXT                   -- JSON
);
CREATE INDEX audit_of_account ON audit (account_id, number);

CREATE TRIGGER audit_is_never_edited BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log is never edited'); END;
-- INSERT OR REPLACE deletes without firing the trigger below.
CREATE TRIGGER audit_is_never_replaced BEFORE INSERT ON audit WHEN EXISTS (
    SELECT 1 FROM audit WHERE id = NEW.id OR number = NEW.number
)
BEGIN SELECT RAISE(ABORT, 'the audit log is never replaced'); END;
CREATE TRIGGER audit_is_never_deleted BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log is never deleted'); END;
