//! A vhost-user net backend that polls requests and delivers completions without exits.
