-- The copies of an artifact for as long as it lives: inspected, repaired, and deleted in the end.

-- An artifact may be deleted from the buckets; its row stays.
ALTER TABLE artifacts ADD COLUMN deleted_at BIGINT;
ALTER TABLE artifacts ADD COLUMN deleted_by TEXT;
ALTER TABLE artifacts ADD COLUMN deleted_why TEXT;
CREATE INDEX artifacts_living ON artifacts (artifact, encoding, created_at) WHERE deleted_at IS NULL;

-- Artifacts that are kept whatever comes.
CREATE TABLE pins (
    name TEXT NOT NULL PRIMARY KEY REFERENCES artifacts (name),
    reason TEXT,
    pinned_by TEXT NOT NULL,
    pinned_at BIGINT NOT NULL
);

-- The objects of an encoding: several names may share them. A row comes with the first inspection or removal and stays.
CREATE TABLE encodings (
    artifact TEXT NOT NULL,
    encoding TEXT NOT NULL,
    -- Rises when somebody begins to remove its objects: what was seen of them before counts for nothing.
    generation BIGINT NOT NULL DEFAULT 0,
    -- 0: its objects stay; 1: some are to be removed; 2: somebody removes them now, and nobody may count on them.
    removal BIGINT NOT NULL DEFAULT 0,
    -- Whether the main bucket's are.
    remove_main BIGINT NOT NULL DEFAULT 0,
    owner TEXT,
    owned_until BIGINT NOT NULL DEFAULT 0,
    tries BIGINT NOT NULL DEFAULT 0,
    next_try_at BIGINT NOT NULL DEFAULT 0,
    -- What its main bucket lost, since when, and the numbers of the parts whose bytes are wrong.
    damage TEXT,
    damaged_at BIGINT,
    doubted TEXT,
    -- The last inspection; NULL: it has no living name, and none is due.
    checked_at BIGINT,
    -- Inspected next, before those whose time has come.
    urgent BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (artifact, encoding)
);
CREATE INDEX encodings_by_check ON encodings (checked_at) WHERE checked_at IS NOT NULL AND removal = 0;
CREATE INDEX encodings_urgent ON encodings (urgent) WHERE urgent = 1;
CREATE INDEX encodings_removal ON encodings (next_try_at) WHERE removal > 0;
CREATE INDEX encodings_damaged ON encodings (next_try_at) WHERE damage IS NOT NULL;

ALTER TABLE replications ADD COLUMN bytes_per_s BIGINT NOT NULL DEFAULT 0;
-- When an inspection found it damaged, and the numbers of the parts whose bytes are wrong.
ALTER TABLE replications ADD COLUMN damaged_at BIGINT;
ALTER TABLE replications ADD COLUMN doubted TEXT;
ALTER TABLE replications ADD COLUMN checked_at BIGINT;
-- Its objects are to be removed: it is no copy any more.
ALTER TABLE replications ADD COLUMN removing BIGINT NOT NULL DEFAULT 0;

-- When it came back into service: what it missed before is caught up with.
ALTER TABLE regions ADD COLUMN back_at BIGINT NOT NULL DEFAULT 0;

-- What a machine runs, and what it ran before that: it may go back to it.
ALTER TABLE machine_apps ADD COLUMN active TEXT;
ALTER TABLE machine_apps ADD COLUMN was_active TEXT;
UPDATE machine_apps SET active = artifact WHERE state = 'ACTIVE';
