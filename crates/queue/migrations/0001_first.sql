-- The coordinator's whole database, in the SQL that SQLite and PostgreSQL share: BIGINT and TEXT columns,
-- no database-made keys (the counters below give them), no database-side clock. Times are milliseconds
-- since the Unix epoch; hashes are hexadecimal; flags are 0 or 1.

-- Numbers that only rise. A row's lock makes the order of the numbers the order of the commits, which a
-- cursor over goals or machines relies on.
CREATE TABLE counters (
    name TEXT NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
);
INSERT INTO counters (name, value) VALUES
    ('epoch', 1), ('job', 0), ('rollout', 0), ('goal', 0), ('machine', 0), ('audit', 0);

CREATE TABLE apps (
    name TEXT NOT NULL PRIMARY KEY,
    spec TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    -- The number of its newest goal, and that goal's place in the order of all goals.
    revision BIGINT NOT NULL DEFAULT 0,
    goal_seq BIGINT NOT NULL DEFAULT 0
);

CREATE TABLE jobs (
    id BIGINT NOT NULL PRIMARY KEY,
    created_at BIGINT NOT NULL,
    app TEXT NOT NULL REFERENCES apps (name),
    commit_sha TEXT NOT NULL,
    name TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    attempt BIGINT NOT NULL,
    max_attempts BIGINT NOT NULL,
    lease TEXT,
    worker TEXT,
    host TEXT,
    incarnation TEXT,
    last_heartbeat BIGINT,
    started_at BIGINT,
    finished_at BIGINT,
    cancel_requested BIGINT NOT NULL,
    cancelled_by TEXT,
    reason TEXT,
    artifact TEXT,
    requested_by TEXT NOT NULL
);
CREATE INDEX jobs_by_status ON jobs (status, created_at, id);
CREATE INDEX jobs_by_app ON jobs (app, created_at, id);
CREATE INDEX jobs_by_time ON jobs (created_at, id);

CREATE TABLE attempts (
    job BIGINT NOT NULL REFERENCES jobs (id),
    attempt BIGINT NOT NULL,
    lease TEXT NOT NULL,
    worker TEXT NOT NULL,
    host TEXT NOT NULL,
    incarnation TEXT NOT NULL,
    started_at BIGINT NOT NULL,
    finished_at BIGINT,
    -- What its worker said at its end, so that the same end told twice is answered alike.
    outcome TEXT,
    reason TEXT,
    PRIMARY KEY (job, attempt)
);

CREATE TABLE artifacts (
    name TEXT NOT NULL PRIMARY KEY,
    app TEXT NOT NULL REFERENCES apps (name),
    artifact TEXT NOT NULL,
    encoding TEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    encoded_bytes BIGINT NOT NULL,
    piece_size_bytes BIGINT NOT NULL,
    pieces BIGINT NOT NULL,
    job BIGINT,
    commit_sha TEXT,
    created_at BIGINT NOT NULL,
    requested_by TEXT NOT NULL
);
CREATE INDEX artifacts_by_id ON artifacts (artifact, created_at);
CREATE INDEX artifacts_by_app ON artifacts (app, created_at);
CREATE INDEX artifacts_by_time ON artifacts (created_at);

CREATE TABLE regions (
    name TEXT NOT NULL PRIMARY KEY,
    configured BIGINT NOT NULL,
    drained BIGINT NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE region_processes (
    region TEXT NOT NULL,
    machine TEXT NOT NULL,
    last_seen BIGINT NOT NULL,
    PRIMARY KEY (region, machine)
);

-- The copy of an encoding in a region's bucket. Two artifacts' names with the same encoding share it.
CREATE TABLE replications (
    artifact TEXT NOT NULL,
    encoding TEXT NOT NULL,
    region TEXT NOT NULL REFERENCES regions (name),
    status TEXT NOT NULL,
    bytes_done BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    started_at BIGINT,
    finished_at BIGINT,
    reason TEXT,
    tries BIGINT NOT NULL,
    next_try_at BIGINT NOT NULL,
    -- Which coordinator process copies, and until when nobody else may.
    owner TEXT,
    owned_until BIGINT NOT NULL,
    PRIMARY KEY (artifact, encoding, region)
);
CREATE INDEX replications_by_status ON replications (status, created_at);

CREATE TABLE rollouts (
    id BIGINT NOT NULL PRIMARY KEY,
    app TEXT NOT NULL REFERENCES apps (name),
    epoch BIGINT NOT NULL,
    number BIGINT NOT NULL,
    artifact TEXT NOT NULL,
    encoding TEXT NOT NULL,
    artifact_name TEXT NOT NULL REFERENCES artifacts (name),
    status TEXT NOT NULL,
    reason TEXT,
    is_rollback BIGINT NOT NULL,
    selector TEXT NOT NULL,
    -- JSON: the plan, the machines that it is for by region, and once it ended how each region was.
    plan TEXT NOT NULL,
    targets TEXT NOT NULL,
    summary TEXT,
    created_at BIGINT NOT NULL,
    finished_at BIGINT,
    requested_by TEXT NOT NULL,
    UNIQUE (app, epoch, number)
);
CREATE INDEX rollouts_by_status ON rollouts (status, id);
CREATE INDEX rollouts_by_app ON rollouts (app, id);

CREATE TABLE goals (
    seq BIGINT NOT NULL PRIMARY KEY,
    app TEXT NOT NULL REFERENCES apps (name),
    epoch BIGINT NOT NULL,
    number BIGINT NOT NULL,
    rollout BIGINT NOT NULL REFERENCES rollouts (id),
    -- The signed goal, in hexadecimal.
    signed TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    UNIQUE (app, epoch, number)
);

CREATE TABLE machines (
    name TEXT NOT NULL PRIMARY KEY,
    region TEXT NOT NULL,
    zone TEXT NOT NULL,
    labels TEXT NOT NULL,
    version TEXT NOT NULL,
    address TEXT NOT NULL,
    last_seen BIGINT NOT NULL,
    -- The `machine` counter at the last change of its region or labels.
    changed BIGINT NOT NULL
);
CREATE INDEX machines_by_change ON machines (changed, name);
CREATE INDEX machines_by_region ON machines (region, name);

CREATE TABLE machine_apps (
    machine TEXT NOT NULL,
    app TEXT NOT NULL,
    region TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    number BIGINT NOT NULL,
    sequence BIGINT NOT NULL,
    artifact TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT,
    pieces BIGINT NOT NULL,
    pieces_total BIGINT NOT NULL,
    peer_bytes BIGINT NOT NULL,
    origin_bytes BIGINT NOT NULL,
    corrupt_pieces BIGINT NOT NULL,
    state_at BIGINT NOT NULL,
    PRIMARY KEY (machine, app)
);
CREATE INDEX machine_apps_by_goal ON machine_apps (app, epoch, number, region, state);

CREATE TABLE audit (
    id BIGINT NOT NULL PRIMARY KEY,
    at BIGINT NOT NULL,
    who TEXT NOT NULL,
    origin TEXT NOT NULL,
    what TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE INDEX audit_by_time ON audit (at, id);
