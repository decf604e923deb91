-- Daily sums, so that a page reads a few rows where a million calls lie; vouchers; and the indexes
-- that the dashboard's lists ask for.

-- What ended calls come to, by the UTC day in which they began. '' stands for none, because NULLs
-- are never equal to each other and so would not be added up.
CREATE TABLE call_day (
    account_id TEXT NOT NULL,
    day BIGINT NOT NULL,          -- days since the epoch
    key_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    route TEXT NOT NULL,
    model TEXT NOT NULL,
    calls BIGINT NOT NULL,
    failed BIGINT NOT NULL,       -- of them, given back whole
    captured BIGINT NOT NULL,
    cost_usd TEXT NOT NULL,       -- decimal; what they cost the operator, as far as it is known
    first_number BIGINT NOT NULL, -- of the account's calls among them: where to look for them
    last_number BIGINT NOT NULL,
    PRIMARY KEY (account_id, day, key_id, user_id, route, model)
);
CREATE INDEX call_day_of_all ON call_day (day);
INSERT INTO call_day (account_id, day, key_id, user_id, route, model, calls, failed, captured,
    cost_usd, first_number, last_number)
SELECT account_id, day, key_id, user_id, route, model, calls, failed, captured,
    printf('%d', dollars + rest / 1000000000000) || CASE WHEN places = 0 THEN ''
        ELSE '.' || substr(printf('%012d', rest % 1000000000000), 1, places) END,
    first_number, last_number
FROM (
    -- SQLite has no decimals, and floats would round. A cost has at most twelve places, so it is
    -- two whole numbers: of dollars, and of 10^-12 dollars beside them.
    SELECT account_id, created_at / 86400000 AS day, COALESCE(key_id, '') AS key_id,
        COALESCE(user_id, '') AS user_id, route, COALESCE(model, '') AS model,
        COUNT(*) AS calls, SUM(status = 'voided') AS failed, SUM(captured) AS captured,
        SUM(CAST(cost AS INTEGER)) AS dollars,
        SUM(CAST(substr(substr(cost, point + 1) || '000000000000', 1, 12) AS INTEGER)) AS rest,
        MAX(length(cost) - point) AS places,
        MIN(number) AS first_number, MAX(number) AS last_number
    FROM (
        SELECT *, COALESCE(cost_usd, '0') AS cost,
            CASE WHEN instr(cost_usd, '.') > 0 THEN instr(cost_usd, '.')
                ELSE length(COALESCE(cost_usd, '0')) END AS point
        FROM call WHERE status <> 'held'
    ) c GROUP BY 1, 2, 3, 4, 5, 6
) ended;

-- What entries come to, by the UTC day of each and its kind.
CREATE TABLE entry_day (
    account_id TEXT NOT NULL,
    day BIGINT NOT NULL,
    kind TEXT NOT NULL,
    entries BIGINT NOT NULL,
    amount BIGINT NOT NULL,
    first_number BIGINT NOT NULL,
    last_number BIGINT NOT NULL,
    PRIMARY KEY (account_id, day, kind)
);
INSERT INTO entry_day (account_id, day, kind, entries, amount, first_number, last_number)
SELECT account_id, created_at / 86400000, kind, COUNT(*), SUM(amount), MIN(number), MAX(number)
FROM entry GROUP BY 1, 2, 3;

-- An account's calls of one route, or those that failed, newest first.
CREATE INDEX call_of_route ON call (account_id, route, number);
CREATE INDEX call_failed ON call (account_id, number) WHERE status = 'voided';
-- By account too: a page lists what one has in flight.
DROP INDEX call_in_flight;
CREATE INDEX call_in_flight ON call (account_id, incarnation) WHERE status = 'held';

-- What came and went beside calls, for statements.
CREATE INDEX entry_aside ON entry (account_id, number) WHERE kind <> 'capture';

-- A code that whoever holds it turns into credits, once.
CREATE TABLE voucher (
    id TEXT PRIMARY KEY,
    code_hash BLOB NOT NULL UNIQUE,
    number BIGINT NOT NULL UNIQUE,  -- in the order in which they were made
    credits BIGINT NOT NULL CHECK (credits > 0),
    note TEXT,
    created_at BIGINT NOT NULL,
    created_by TEXT NOT NULL,
    account_id TEXT REFERENCES account (id),  -- whose it became
    redeemed_at BIGINT,
    cancelled_at BIGINT,
    CHECK ((account_id IS NULL) = (redeemed_at IS NULL)),
    CHECK (redeemed_at IS NULL OR cancelled_at IS NULL)
);

-- The operator lists all accounts and all keys, newest first.
CREATE INDEX account_by_age ON account (created_at, id);
CREATE INDEX api_key_by_age ON api_key (created_at, id);
