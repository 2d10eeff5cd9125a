-- What happened, told to programs and people; what starts a build by itself, and what is deployed by itself.

-- Events as they are written, each in its change's transaction. They get their numbers later, by one who gives them to all:
-- a counter here would put all claims and ends of jobs in one line. `place` only says which of two came first where
-- one followed from the other.
CREATE TABLE event_outbox (
    place BIGINT NOT NULL PRIMARY KEY,
    at BIGINT NOT NULL,
    kind TEXT NOT NULL,
    app TEXT NOT NULL,
    job BIGINT,
    attempt BIGINT,
    rollout BIGINT,
    name TEXT,
    commit_sha TEXT,
    status TEXT,
    reason TEXT,
    who TEXT,
    worker TEXT
);

-- The same, numbered: a reader that goes by the number misses none.
CREATE TABLE events (
    seq BIGINT NOT NULL PRIMARY KEY,
    at BIGINT NOT NULL,
    kind TEXT NOT NULL,
    app TEXT NOT NULL,
    job BIGINT,
    attempt BIGINT,
    rollout BIGINT,
    name TEXT,
    commit_sha TEXT,
    status TEXT,
    reason TEXT,
    who TEXT,
    worker TEXT
);
CREATE INDEX events_by_app ON events (app, seq);
CREATE INDEX events_by_time ON events (at);
INSERT INTO counters (name, value) VALUES ('event', 0), ('webhook', 0);

CREATE TABLE webhooks (
    id BIGINT NOT NULL PRIMARY KEY,
    url TEXT NOT NULL,
    -- Only events of this app.
    app TEXT,
    -- Only events of these kinds, each between two commas; empty: all.
    kinds TEXT NOT NULL,
    -- Sealed: whoever reads the database alone cannot sign.
    secret TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    created_by TEXT NOT NULL
);

-- A message to a webhook, from its event's number on: the outbox of the webhooks, and then their log.
CREATE TABLE deliveries (
    webhook BIGINT NOT NULL,
    -- The same in every attempt, so that a receiver knows what it has.
    message TEXT NOT NULL,
    -- The event; none for a test.
    seq BIGINT,
    kind TEXT NOT NULL,
    status TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    tries BIGINT NOT NULL,
    next_try_at BIGINT NOT NULL,
    last_try_at BIGINT,
    -- The HTTP status of the last answer, and how long it took.
    answer BIGINT,
    latency_ms BIGINT,
    reason TEXT,
    finished_at BIGINT,
    PRIMARY KEY (webhook, message)
);
CREATE INDEX deliveries_due ON deliveries (webhook, next_try_at) WHERE status = 'PENDING';
CREATE INDEX deliveries_pending ON deliveries (seq) WHERE status = 'PENDING';
CREATE INDEX deliveries_by_end ON deliveries (finished_at);
CREATE INDEX deliveries_by_time ON deliveries (webhook, created_at);

-- Whose pushes start builds of an app.
CREATE TABLE push_sources (
    app TEXT NOT NULL PRIMARY KEY REFERENCES apps (name),
    -- As it is compared; empty: the app's own.
    repository TEXT NOT NULL,
    branch TEXT NOT NULL,
    secret TEXT NOT NULL,
    updated_at BIGINT NOT NULL
);

-- Pushes that were taken: none is taken twice, and what they built is known as the main branch's.
CREATE TABLE pushes (
    delivery TEXT NOT NULL,
    app TEXT NOT NULL,
    job BIGINT NOT NULL,
    commit_sha TEXT NOT NULL,
    branch TEXT NOT NULL,
    at BIGINT NOT NULL,
    PRIMARY KEY (delivery, app)
);
CREATE INDEX pushes_by_job ON pushes (app, job);
CREATE INDEX pushes_by_time ON pushes (at);

-- Apps whose main branch is deployed by itself.
CREATE TABLE auto_deploys (
    app TEXT NOT NULL PRIMARY KEY REFERENCES apps (name),
    -- Only builds after this one.
    after_job BIGINT NOT NULL,
    suspended_at BIGINT,
    suspended_by TEXT,
    suspended_reason TEXT
);

-- History is read by what was built but never deployed, too.
CREATE INDEX rollouts_by_artifact ON rollouts (artifact_name);
CREATE INDEX rollouts_by_time ON rollouts (created_at, id);
