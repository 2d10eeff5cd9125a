-- For PostgreSQL alone: what many writers at once would wait for.

-- Each end of a job would lock its app's row and each region's against their removal, thousands of times a second the
-- same rows. Neither apps nor regions are ever removed; nor are jobs.
ALTER TABLE artifacts DROP CONSTRAINT artifacts_app_fkey;
ALTER TABLE attempts DROP CONSTRAINT attempts_job_fkey;
ALTER TABLE replications DROP CONSTRAINT replications_region_fkey;
