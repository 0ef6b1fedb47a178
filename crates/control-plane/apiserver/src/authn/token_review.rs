//! `POST tokenreviews`: says who a token is. Upstream counterpart: pkg/registry/authentication/tokenreview.
use serde_json::{Value, json};

use super::Authenticator;
use crate::authz::reviews::user_info;
use crate::status::Status;

impl Authenticator {
    /// Answers the TokenReview with its status filled in.
    pub async fn token_review(&self, mut review: Value) -> Result<Value, Status> {
        let token = review.pointer("/spec/token").and_then(Value::as_str).unwrap_or_default().to_string();
        if token.is_empty() {
            return Err(Status::bad_request("token is required for TokenReview in authentication"));
        }
        let audiences: Vec<String> = review
            .pointer("/spec/audiences")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(|a| a.as_str().map(str::to_string))
            .collect();
        review["status"] = match self.by_token(&token, &audiences).await {
            Ok(Some(found)) => {
                let mut status = json!({"authenticated": true, "user": user_info(&found.identity)});
                if !found.audiences.is_empty() {
                    status["audiences"] = json!(found.audiences);
                }
                status
            }
            Ok(None) => json!({"user": {}, "error": "invalid bearer token"}),
            Err(error) => json!({"user": {}, "error": format!("[invalid bearer token, {error}]")}),
        };
        Ok(review)
    }
}
