//! The audit log.

use shoal_client::types;
use shoal_queue::{AuditFilter, AuditRow};

use super::{App, Args, Reply, pages::Paging};

fn view(row: AuditRow) -> types::AuditRow {
    types::AuditRow {
        id: row.id,
        at_ms: row.at_ms,
        who: row.who,
        origin: row.origin,
        what: row.what,
        subject: row.subject,
        app: row.app,
        detail: row.detail,
    }
}

pub(super) async fn list(
    shared: App,
    Args(args): Args<types::AuditQuery>,
) -> Reply<types::Page<types::AuditRow>> {
    let paging = Paging::of("audit", args.limit, args.cursor.as_deref())?;
    let filter = AuditFilter {
        app: args.app.map(|app| app.to_string()),
        subject: args.subject,
        who: args.who,
        what: args.what,
        since_ms: args.since_ms,
        before: paging.after,
    };
    let rows = shared.queue.audit_rows(&filter, paging.wanted()).await?;
    Ok(paging.page(rows, |row| row.id, view))
}
