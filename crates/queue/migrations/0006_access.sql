-- Who may use the API without a certificate, and what a caller's request has done already.

INSERT INTO counters (name, value) VALUES ('token', 0);

-- Tokens, by the BLAKE3 hash of the secret, which is not kept.
CREATE TABLE tokens (
    id BIGINT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    hash TEXT NOT NULL UNIQUE,
    role TEXT NOT NULL,
    -- JSON: the apps that it is bound to; NULL: all, and what is of no app.
    apps TEXT,
    created_at BIGINT NOT NULL,
    created_by TEXT NOT NULL,
    expires_at BIGINT,
    revoked_at BIGINT,
    revoked_by TEXT,
    last_used_at BIGINT
);

-- Requests with an idempotency key, by the hash of caller and key.
CREATE TABLE requests (
    id TEXT NOT NULL PRIMARY KEY,
    -- BLAKE3 of what was asked for: another request with this key is refused.
    fingerprint TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    -- Rises while a coordinator works on it; NULL when one has answered.
    beat BIGINT,
    -- What it has made, written in the transaction that made it.
    made BIGINT,
    -- The answer.
    status BIGINT,
    body TEXT
);
CREATE INDEX requests_by_time ON requests (created_at);

-- The app that a change was about; NULL for what is of no app.
ALTER TABLE audit ADD COLUMN app TEXT;
UPDATE audit SET app = (SELECT a.name FROM apps a WHERE a.name = audit.subject) WHERE what LIKE 'app.%';
UPDATE audit SET app = (SELECT j.app FROM jobs j WHERE j.name = audit.subject) WHERE what LIKE 'job.%';
UPDATE audit SET app = (SELECT a.app FROM artifacts a WHERE a.name = audit.subject) WHERE what LIKE 'artifact.%';
UPDATE audit SET app = (SELECT r.app FROM rollouts r WHERE CAST(r.id AS TEXT) = audit.subject) WHERE what LIKE 'rollout.%';
CREATE INDEX audit_by_app ON audit (app, id);
