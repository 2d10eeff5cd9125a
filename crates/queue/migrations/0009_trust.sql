-- Membership over time: the trust bundles, who has which key, and the tokens of those who are to come.

-- Changes of trust come one after the other: this row is their lock.
INSERT INTO counters (name, value) VALUES ('trust', 0);

-- The signed bundles. They are few: one a change that a person asked for.
CREATE TABLE trust (
    number BIGINT NOT NULL PRIMARY KEY,
    key_id BIGINT NOT NULL,
    signed TEXT NOT NULL,
    created_at BIGINT NOT NULL
);

-- Members by their keys, as far as a coordinator spoke with them or gave them a certificate. Agents speak with region
-- processes, which tell of their keys: those stand beside the machines.
CREATE TABLE members (
    node TEXT NOT NULL PRIMARY KEY,
    machine TEXT NOT NULL,
    role TEXT NOT NULL,
    region TEXT,
    last_seen BIGINT NOT NULL,
    revoked_at BIGINT,
    revoked_by TEXT
);
CREATE INDEX members_by_machine ON members (machine);
CREATE INDEX members_revoked ON members (revoked_at) WHERE revoked_at IS NOT NULL;
ALTER TABLE machines ADD COLUMN node TEXT;

-- What each region process knows of its machines' trust and certificates, in JSON.
ALTER TABLE region_processes ADD COLUMN standing TEXT;

-- Tokens by which new machines join: their hashes alone.
CREATE TABLE join_tokens (
    id TEXT NOT NULL PRIMARY KEY,
    hash TEXT NOT NULL UNIQUE,
    role TEXT NOT NULL,
    region TEXT,
    zone TEXT,
    labels TEXT NOT NULL,
    uses_left BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    created_by TEXT NOT NULL
);
