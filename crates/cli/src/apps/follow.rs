//! `shoal app push`, `shoal app auto-deploy`: what starts by itself.

use std::path::PathBuf;

use clap::ValueEnum;
use shoal_client::types::{
    AutoDeploy, AutoDeployRequest, AutoDeploySwitch, PushRequest, PushSettings,
};
use shoal_proto::AppName;

use crate::{connect::Connection, show, webhooks::read_secret};

#[derive(clap::Args)]
pub(crate) struct PushArgs {
    /// The app.
    app: AppName,
    /// File with the secret that GitHub or GitLab signs with.
    #[arg(long, value_name = "FILE", conflicts_with = "off")]
    secret_file: Option<PathBuf>,
    /// The branch that is built.
    #[arg(long, default_value = "main", requires = "secret_file")]
    branch: String,
    /// The repository that pushes name, when it is not the app's own.
    #[arg(long, value_name = "URL", requires = "secret_file")]
    repository: Option<String>,
    /// Let no push start a build.
    #[arg(long)]
    off: bool,
    #[command(flatten)]
    connection: Connection,
}

impl PushArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        if self.off {
            client.unset_push(&self.app).await?;
            let none = serde_json::json!({});
            return show::print_as(self.connection.json, &none, |_| {
                format!("no push starts a build of {}", self.app)
            });
        }
        let settings = match &self.secret_file {
            Some(path) => {
                let request = PushRequest {
                    secret: read_secret(path)?,
                    branch: self.branch,
                    repository: self.repository,
                };
                client.set_push(&self.app, &request).await?
            }
            None => client.push_settings(&self.app).await?,
        };
        show::print_as(self.connection.json, &settings, |settings| pushes(settings, client.url()))
    }
}

fn pushes(settings: &PushSettings, url: &str) -> String {
    let mut table = show::table(&["APP", settings.app.as_str()]);
    table.add_row(["repository", &settings.repository]);
    table.add_row(["branch", &settings.branch]);
    table.add_row(["GitHub posts to", &format!("{url}v1/hooks/github")]);
    table.add_row(["GitLab posts to", &format!("{url}v1/hooks/gitlab")]);
    show::render(&table, "")
}

#[derive(Clone, Copy, ValueEnum)]
enum Switch {
    /// Deploy what pushes bring from now on.
    On,
    /// Do not.
    Off,
    /// Do it again, after an operator went back.
    Resume,
}

#[derive(clap::Args)]
pub(crate) struct AutoDeployArgs {
    /// The app.
    app: AppName,
    /// What to do; without it, it is shown.
    set: Option<Switch>,
    #[command(flatten)]
    connection: Connection,
}

impl AutoDeployArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        let auto = match self.set {
            Some(set) => {
                let set = match set {
                    Switch::On => AutoDeploySwitch::On,
                    Switch::Off => AutoDeploySwitch::Off,
                    Switch::Resume => AutoDeploySwitch::Resume,
                };
                client.set_auto_deploy(&self.app, &AutoDeployRequest { set }).await?
            }
            None => client.auto_deploy(&self.app).await?,
        };
        show::print_as(self.connection.json, &auto, auto_deploy)
    }
}

fn auto_deploy(auto: &AutoDeploy) -> String {
    let app = &auto.app;
    match &auto.suspended {
        _ if !auto.on => format!("{app}: off"),
        None => format!("{app}: on"),
        Some(halt) => {
            let reason = halt.reason.as_deref().unwrap_or("an operator went back");
            let ago = show::ago(halt.at_ms);
            format!(
                "{app}: suspended {ago}: {reason}; go on with: shoal app auto-deploy {app} resume"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_client::types::Halt;

    use super::*;

    #[test]
    fn a_suspension_says_why_and_how_it_ends() {
        let app = AppName::new("web").unwrap();
        let mut auto = AutoDeploy { app, on: false, after_job: None, suspended: None };
        assert_eq!(auto_deploy(&auto), "web: off");
        auto.on = true;
        assert_eq!(auto_deploy(&auto), "web: on");
        let reason = Some("alice went back to web/a".into());
        auto.suspended = Some(Halt { reason, by: "alice".into(), at_ms: 0 });
        let text = auto_deploy(&auto);
        assert!(text.contains("alice went back to web/a") && text.ends_with("resume"), "{text}");
    }
}
